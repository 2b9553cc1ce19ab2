"""The paper's tables and figures: `open-gem reproduce`.

rows        every experiment as a value: its methods, models and curves
measuring   all rows of all experiments that share a model and a split, from one pass over the data
qualitative the figures without numbers
clustering  self-self attention as clustering (section 4.2), drawn by `figures`
numbers     the paper's values
rendering   tables and curves, beside the paper's values
runs        stored runs with their scores
report      stored runs as tables
"""
