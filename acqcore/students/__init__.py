"""The student: a model's trunk and head, sharded or not; tokenization of samples; forwards under dropout."""
