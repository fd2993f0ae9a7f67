"""What several test files share: servers, databases, generated videos, tiny networks."""
