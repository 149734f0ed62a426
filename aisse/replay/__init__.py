"""The replay log: `memory` is one process alone, `redis` shares it among instances."""
