"""How the bundled `nano` model is made: scenes, language, training, export, evaluation."""
