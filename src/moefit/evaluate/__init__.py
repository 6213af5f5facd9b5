"""What a model is worth: perplexity and cost under each inference rule."""
