//! A fast Fourier transform of power-of-two length (Cooley and Tukey 1965), for convolving privacy losses.

use std::f64::consts::PI;

/// A complex number.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Complex {
    pub(super) re: f64,
    pub(super) im: f64,
}

impl Complex {
    pub(super) const ONE: Self = Self { re: 1.0, im: 0.0 };

    pub(super) fn times(self, other: Self) -> Self {
        Self {
            re: self.re * other.re - self.im * other.im,
            im: self.re * other.im + self.im * other.re,
        }
    }

    /// `self` to a whole power, by squaring; what is too small to matter becomes zero.
    pub(super) fn power(self, mut exponent: u64) -> Self {
        let (mut result, mut base) = (Self::ONE, self);
        while exponent > 0 {
            if exponent & 1 == 1 {
                result = result.times(base);
            }
            exponent >>= 1;
            base = base.times(base);
            if base.re.abs() + base.im.abs() < 1e-150 {
                // The highest bit is still to come, so the power is zero; denormal numbers would only be slow.
                return if exponent > 0 { Self::default() } else { result };
            }
        }
        result
    }
}

/// Roots of unity for one length.
#[derive(Debug)]
pub(super) struct Transform {
    roots: Vec<Complex>,
}

impl Transform {
    /// For vectors of `length` numbers.
    ///
    /// # Panics
    /// Unless `length` is a power of two.
    pub(super) fn new(length: usize) -> Self {
        assert!(length.is_power_of_two(), "the length is a power of two");
        let root = |k: usize| {
            let (im, re) = (-2.0 * PI * k as f64 / length as f64).sin_cos();
            Complex { re, im }
        };
        Self {
            roots: (0..length / 2).map(root).collect(),
        }
    }

    /// The transform, in place.
    pub(super) fn forward(&self, values: &mut [Complex]) {
        let length = values.len();
        debug_assert!(
            length == 1 || length == 2 * self.roots.len(),
            "made for this length"
        );
        reverse_bits(values);
        let mut half = 1;
        while half < length {
            let stride = length / (2 * half);
            for pair in values.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (k, (a, b)) in low.iter_mut().zip(high).enumerate() {
                    let turned = b.times(self.roots[k * stride]);
                    *b = Complex {
                        re: a.re - turned.re,
                        im: a.im - turned.im,
                    };
                    *a = Complex {
                        re: a.re + turned.re,
                        im: a.im + turned.im,
                    };
                }
            }
            half *= 2;
        }
    }

    /// The inverse, in place.
    pub(super) fn inverse(&self, values: &mut [Complex]) {
        self.forward(values);
        let scale = 1.0 / values.len() as f64;
        if let Some(rest) = values.get_mut(1..) {
            rest.reverse();
        }
        for value in values {
            value.re *= scale;
            value.im *= scale;
        }
    }
}

fn reverse_bits(values: &mut [Complex]) {
    let bits = values.len().trailing_zeros();
    if bits == 0 {
        return;
    }
    for index in 0..values.len() {
        let other = index.reverse_bits() >> (usize::BITS - bits);
        if other > index {
            values.swap(index, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn real(values: &[f64]) -> Vec<Complex> {
        values.iter().map(|re| Complex { re: *re, im: 0.0 }).collect()
    }

    #[test]
    fn a_convolution_is_the_one_by_hand() {
        let transform = Transform::new(8);
        let mut a = real(&[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let mut b = real(&[0.5, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
        transform.forward(&mut a);
        transform.forward(&mut b);
        let mut product: Vec<Complex> = a.iter().zip(&b).map(|(a, b)| a.times(*b)).collect();
        transform.inverse(&mut product);
        // (1, 2, 3) ∗ (.5, 0, 4, …, 1), wrapped around.
        for (found, expected) in product.iter().zip([2.5, 4.0, 5.5, 8.0, 12.0, 0.0, 0.0, 1.0]) {
            assert!(
                (found.re - expected).abs() < 1e-13 && found.im.abs() < 1e-13,
                "{product:?}"
            );
        }
    }

    #[test]
    fn powers_are_repeated_products() {
        let z = Complex { re: 0.6, im: -0.75 };
        let seven = (0..7).fold(Complex::ONE, |product, _| product.times(z));
        let found = z.power(7);
        assert!((found.re - seven.re).abs() < 1e-15 && (found.im - seven.im).abs() < 1e-15);
        assert_eq!(Complex { re: 0.5, im: 0.0 }.power(1 << 40), Complex::default());
        assert_eq!(z.power(0), Complex::ONE);
    }
}
