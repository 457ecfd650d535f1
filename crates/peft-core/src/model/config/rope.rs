//! Rotary positions: angles per position, and how they are changed for long contexts.

/// Rotary position embedding, half-rotation as in transformers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are changed for long contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Low ones divided, high ones kept, blended between (Llama 3.1).
    Llama3 {
        /// What low frequencies are divided by.
        factor: f64,
        /// Wavelengths above `original_positions / low_frequency_factor` are divided.
        low_frequency_factor: f64,
        /// Wavelengths below `original_positions / high_frequency_factor` are kept.
        high_frequency_factor: f64,
        /// Context length before scaling.
        original_positions: usize,
    },
}

impl Rope {
    /// Angle per position of each pair of a head's features, `[head_dim / 2]`.
    ///
    /// Rounded to f32 where transformers rounds, so that angles agree at long positions too.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f32 / head_dim as f32;
                let frequency = 1.0 / (self.theta as f32).powf(exponent);
                self.scaling.apply(frequency)
            })
            .collect()
    }
}

impl RopeScaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_positions } => {
                let wavelength = std::f32::consts::TAU / frequency;
                let original = original_positions as f64;
                if wavelength > (original / low_frequency_factor) as f32 {
                    return frequency / factor as f32;
                }
                if wavelength < (original / high_frequency_factor) as f32 {
                    return frequency;
                }
                let smooth = (original as f32 / wavelength - low_frequency_factor as f32)
                    / (high_frequency_factor - low_frequency_factor) as f32;
                (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_positions: 8192,
    };

    #[test]
    fn rotary_frequencies_are_scaled_as_transformers_scales_them() {
        let of = |scaling| Rope { theta: 500_000.0, scaling }.inverse_frequencies(128);
        let (plain, linear, llama3) =
            (of(RopeScaling::None), of(RopeScaling::Linear { factor: 4.0 }), of(LLAMA3));
        assert_eq!(plain.len(), 64);
        assert_eq!(plain[0], 1.0);
        let (mut kept, mut divided) = (0, 0);
        for pair in 0..64 {
            let exact = 500_000_f64.powf(-2.0 * pair as f64 / 128.0);
            // powf, its argument and the reciprocal round at 6e-8 each; the argument's error grows by ln(theta) = 13.
            assert!((f64::from(plain[pair]) - exact).abs() < 2e-6 * exact);
            assert_eq!(linear[pair], plain[pair] / 4.0);
            kept += usize::from(llama3[pair] == plain[pair]);
            divided += usize::from(llama3[pair] == plain[pair] / 8.0);
            assert!(llama3[pair] <= plain[pair] && llama3[pair] >= plain[pair] / 8.0);
        }
        // Wavelengths below 2048 are kept: 2 pi theta^(i/64) < 2048 for i ≤ 28; those above 8192 divided: i ≥ 35.
        assert_eq!((kept, divided), (29, 29));
        assert!(llama3.is_sorted_by(|earlier, later| earlier > later));
    }
}
