"""`headrace doctor`: what this machine has and lacks, and what to do about it.

Three steps that know nothing of one another: `machine` reads facts, `checks` judges them, `report` shows the verdicts.
Nothing is changed, and nothing of headrace's is started.
"""
