"""chiasm's experiments: data, training, evaluation, studies and reports. Ray and Optuna live here."""
