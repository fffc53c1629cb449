"""Data: image bytes, stores on disk, their preparation, and the embedded worlds.

A *store* is a folder of LitData chunks with `index.json`, `sizes.npy` (the height and width of every
image) and `manifest.json` (counts and a sha256 for every chunk). `prepare` writes stores from image
folders, webdataset tars and parquet files; `worlds` writes them from generated or packaged pictures;
`store.ImageStore` reads them.
"""
