//! What becomes of each layer's activations between forward and backward.

use serde::{Deserialize, Serialize};

/// What becomes of a layer's activations between forward and backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// All are kept.
    Everything,
    /// All but the outputs of gate and up, which are computed again.
    Unexpanded,
    /// The layer's input and attention's output are kept; the rest is computed again, without attending again and
    /// without the last product of each half.
    Boundaries,
    /// As [`Level::Boundaries`], but what is kept lies in the host's memory.
    Aside,
}

/// The level of every layer: how many layers have which, the lowest layers first in the order of the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Levels {
    /// Layers of [`Level::Aside`].
    pub aside: usize,
    /// Layers of [`Level::Boundaries`].
    pub boundaries: usize,
    /// Layers of [`Level::Unexpanded`].
    pub unexpanded: usize,
    /// Layers of [`Level::Everything`].
    pub everything: usize,
}

impl Levels {
    const NONE: Self = Self { aside: 0, boundaries: 0, unexpanded: 0, everything: 0 };

    /// Everything is kept.
    pub fn everything(layers: usize) -> Self {
        Self { everything: layers, ..Self::NONE }
    }

    /// Inputs and attention's outputs are kept.
    pub fn boundaries(layers: usize) -> Self {
        Self { boundaries: layers, ..Self::NONE }
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.aside + self.boundaries + self.unexpanded + self.everything
    }

    /// The level of a layer.
    pub fn of(&self, layer: usize) -> Level {
        let mut end = self.aside;
        if layer < end {
            return Level::Aside;
        }
        end += self.boundaries;
        if layer < end {
            return Level::Boundaries;
        }
        end += self.unexpanded;
        if layer < end { Level::Unexpanded } else { Level::Everything }
    }

    /// Places for what layers share that compute their work again.
    pub(super) fn shared_work(&self) -> usize {
        usize::from(self.aside + self.boundaries > 0)
    }

    /// Places for what layers share that compute gate and up again.
    pub(super) fn shared_expansions(&self) -> usize {
        usize::from(self.everything < self.layers())
    }

    /// Places for what layers share whose boundaries lie aside.
    pub(super) fn shared_boundaries(&self) -> usize {
        self.aside.min(2)
    }

    /// Where a layer's input and attention's output lie.
    pub fn boundary_place(&self, layer: usize) -> usize {
        if layer < self.aside { layer % 2 } else { self.shared_boundaries() + layer - self.aside }
    }

    /// Where a layer's work lies.
    pub fn work_place(&self, layer: usize) -> usize {
        let again = self.aside + self.boundaries;
        if layer < again { 0 } else { self.shared_work() + layer - again }
    }

    /// Where a layer's gate and up lie.
    pub fn expansion_place(&self, layer: usize) -> usize {
        let again = self.layers() - self.everything;
        if layer < again { 0 } else { self.shared_expansions() + layer - again }
    }

    /// In words.
    pub fn describe(&self) -> String {
        let layers = self.layers();
        let parts = [
            (self.everything, "keep everything"),
            (self.unexpanded, "compute gate and up again"),
            (self.boundaries, "keep their input and attention's output"),
            (self.aside, "keep those in host memory"),
        ];
        let named = parts.iter().filter(|(count, _)| *count > 0);
        let named: Vec<String> = named
            .map(|(count, what)| {
                if *count == layers {
                    format!("all {layers} layers {what}")
                } else {
                    format!("{count} {what}")
                }
            })
            .collect();
        named.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_keep_what_they_need_share_no_place() {
        let levels = Levels { aside: 3, boundaries: 2, unexpanded: 1, everything: 2 };
        let places =
            |place: fn(&Levels, usize) -> usize| (0..8).map(|at| place(&levels, at)).collect::<Vec<_>>();
        assert_eq!(places(Levels::boundary_place), [0, 1, 0, 2, 3, 4, 5, 6]);
        assert_eq!(places(Levels::work_place), [0, 0, 0, 0, 0, 1, 2, 3]);
        assert_eq!(places(Levels::expansion_place), [0, 0, 0, 0, 0, 0, 1, 2]);
        let everything = Levels::everything(3);
        assert_eq!((0..4).map(|at| everything.boundary_place(at)).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!((everything.work_place(2), everything.expansion_place(2)), (2, 2));
    }
}
