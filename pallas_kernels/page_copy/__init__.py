"""Whole pages, moved between arrays in device memory or in the host's."""

from pallas_kernels.page_copy.call import copy_pages as copy_pages
