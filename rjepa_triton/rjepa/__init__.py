"""R-JEPA: a recurrent encoder of fixated image patches that learns by predicting the next one (paper, Section 2)."""
