"""Answers from a trained model: loading, one call for images and questions, and bulk jobs over whole data sets."""
