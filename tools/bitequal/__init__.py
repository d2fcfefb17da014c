"""Every number and every byte that runs of two versions of the code leave behind, recorded and compared."""
