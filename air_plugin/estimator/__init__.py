"""`AiRClassifier`: from unlabelled images and class names to a classifier, with scikit-learn's conventions."""
