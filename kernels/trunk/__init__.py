"""Device code and PTX making that several ops share."""
