"""What operators see of a server and steer: logs, keys, requests, traces, restarts."""
