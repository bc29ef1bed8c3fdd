"""What a study file may say, as pydantic models."""
