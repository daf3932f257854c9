"""How the built-in demo models are made: training, its pool of images, its losses, and what the models reach."""
