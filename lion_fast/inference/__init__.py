"""Answers from a trained model: loading, and bulk jobs over whole data sets."""
