"""Where frames and indexes come from: files, folders, servers, the disk cache. Nothing is believed here."""
