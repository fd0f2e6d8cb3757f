"""What several test files share: real media, tiny stages, launches."""
