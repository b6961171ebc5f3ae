"""The errors that the paper publishes: Tables 3 to 6 of https://arxiv.org/abs/1409.1556, top-1/top-5, validation, %.

The keys are the column and the training scale: 256, 384, or 256-512 for scale jitter.
"""

TEST_SCALES = {  # from S to Q of single-scale evaluation and the Qs of multi-scale evaluation
    "256": (256, (224, 256, 288)),
    "384": (384, (352, 384, 416)),
    "256-512": (384, (256, 384, 512)),
}
SINGLE_SCALE = {  # Table 3: Q = S, or 384 with jitter
    ("A", "256"): "29.6/10.4",
    ("A-LRN", "256"): "29.7/10.5",
    ("B", "256"): "28.7/9.9",
    ("C", "256"): "28.1/9.4",
    ("C", "384"): "28.1/9.3",
    ("C", "256-512"): "27.3/8.8",
    ("D", "256"): "27.0/8.8",
    ("D", "384"): "26.8/8.7",
    ("D", "256-512"): "25.6/8.1",
    ("E", "256"): "27.3/9.0",
    ("E", "384"): "26.9/8.7",
    ("E", "256-512"): "25.5/8.0",
}
MULTI_SCALE = {  # Table 4: Q = S - 32, S, S + 32, or 256, 384, 512 with jitter
    ("B", "256"): "28.2/9.6",
    ("C", "256"): "27.7/9.2",
    ("C", "384"): "27.8/9.2",
    ("C", "256-512"): "26.3/8.2",
    ("D", "256"): "26.6/8.6",
    ("D", "384"): "26.5/8.6",
    ("D", "256-512"): "24.8/7.5",
    ("E", "256"): "26.9/8.7",
    ("E", "384"): "26.7/8.6",
    ("E", "256-512"): "24.8/7.5",
}
MULTI_CROP = {("D", "256-512"): "24.6/7.5", ("E", "256-512"): "24.6/7.4"}  # Table 5
DENSE_AND_MULTI_CROP = {("D", "256-512"): "24.4/7.2", ("E", "256-512"): "24.4/7.1"}  # Table 5
FUSION = {  # Table 6: D and E, both with jitter
    "multi_scale": "24.0/7.1",
    "multi_crop": "23.9/7.2",
    "dense+multi_crop": "23.7/6.8",
}
