"""The page at `/`: one HTML file, its script and its style, served as they are."""
