//! Scaling to unit length.

/// Scales `vector` to L2 length 1. `false`, with the vector left as it was, when no direction can be
/// told: some number is not finite, or all are zero.
///
/// The sum runs in f64 and in order, so that the result is the same on every platform.
#[must_use]
pub(crate) fn normalise(vector: &mut [f32]) -> bool {
    let norm = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if !norm.is_finite() || norm == 0.0 {
        return false;
    }
    for x in vector {
        *x = (f64::from(*x) / norm) as f32;
    }
    true
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp)]
    use super::normalise;

    #[test]
    fn scales_to_length_one_or_refuses() {
        let mut vector = [3.0, -4.0];
        assert!(normalise(&mut vector));
        assert_eq!(vector, [0.6, -0.8]);
        for mut hopeless in [[0.0, 0.0], [f32::NAN, 1.0], [f32::INFINITY, 1.0]] {
            assert!(!normalise(&mut hopeless), "{hopeless:?}");
        }
        // Squares that f32 could not hold.
        let mut huge = [f32::MAX, f32::MAX];
        assert!(normalise(&mut huge));
        let mut tiny = [f32::MIN_POSITIVE, 0.0];
        assert!(normalise(&mut tiny));
        assert_eq!(tiny, [1.0, 0.0]);
    }
}
