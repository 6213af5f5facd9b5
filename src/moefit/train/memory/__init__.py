"""Training for servers that hold only some of the experts, or hold them in few bits."""
