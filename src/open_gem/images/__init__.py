"""Reading images: here, or in processes that can be stopped. Needs Pillow and NumPy, never torch."""
