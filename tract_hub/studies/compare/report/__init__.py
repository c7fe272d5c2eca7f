"""``report.html``: a comparison as one page that needs nothing beside it."""
