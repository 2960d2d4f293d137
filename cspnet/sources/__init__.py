"""Where encoded images and their labels come from: folders, tar files, parquet files."""
