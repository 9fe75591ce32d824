"""The page at `/`: one HTML file, its script and its style, served as they are."""

FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
