"""Device code of jmla: arrays and bytes in, arrays out. It never imports jmla."""
