"""`open-gem serve`: a localizer behind HTTP. `app.create_app` makes the application, `cli/serve.py` runs it."""
