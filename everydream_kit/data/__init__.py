"""Everything between a folder of images and a batch: files, captions, buckets, plan, pixels, caches, loader, report."""
