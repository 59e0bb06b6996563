"""What a searcher would get, in one process or over ranks; art collections measured in many ways."""
