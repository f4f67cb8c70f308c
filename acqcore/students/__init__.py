"""The student: trunk and head of a model however it is sharded, text as rows of tokens, forwards under dropout."""
