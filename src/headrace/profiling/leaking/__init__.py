"""A leak: counted, judged, confirmed, and traced to its lines and its holder."""
