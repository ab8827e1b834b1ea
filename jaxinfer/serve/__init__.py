"""Interfaces of others: requests and answers as OpenAI's API has them, and batches of them in files."""
