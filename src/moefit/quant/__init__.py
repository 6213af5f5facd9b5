"""How an expert's matrices lie in memory: formats, encoders, computing straight from them."""
