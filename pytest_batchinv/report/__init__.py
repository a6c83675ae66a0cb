"""Reports: records, and their renderings. Pure: results in, lines or files out."""
