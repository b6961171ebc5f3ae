"""The paper's evaluation protocols and their results."""
