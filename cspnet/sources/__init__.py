"""Where images are stored (class folders, tar and parquet files), and the layout of a data root."""
