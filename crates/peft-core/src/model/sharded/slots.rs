//! The two places that layers are gathered in.

use std::sync::Arc;

use crate::{
    error::{Error, Result},
    model::LayerGather,
    quant::AlignedBytes,
};

/// What lies in a place.
#[derive(Debug, Default)]
enum Held {
    /// Nothing of use.
    #[default]
    Nothing,
    /// A layer is on its way; whoever gathers has the place.
    Coming(usize),
    /// A layer.
    Layer(usize),
}

#[derive(Debug, Default)]
struct Slot {
    held: Held,
    bytes: AlignedBytes,
}

/// Two places, and who fills them.
#[derive(Default)]
pub(super) struct Slots {
    gather: Option<Box<dyn LayerGather>>,
    slots: [Slot; 2],
    longest: usize,
    pub(super) gathered: u64,
}

impl Slots {
    pub(super) fn bytes(&self) -> usize {
        if self.gather.is_some() { 2 * self.longest } else { 0 }
    }

    pub(super) fn attach(&mut self, gather: Box<dyn LayerGather>, longest: usize) {
        self.detach();
        self.longest = longest;
        self.gather = Some(gather);
        for slot in &mut self.slots {
            if slot.bytes.len() < longest {
                slot.bytes = AlignedBytes::zeros(longest);
            }
        }
    }

    pub(super) fn detach(&mut self) {
        self.gather = None;
        self.slots = Default::default();
    }

    fn find(&self, layer: usize) -> Option<usize> {
        self.slots
            .iter()
            .position(|slot| matches!(slot.held, Held::Coming(of) | Held::Layer(of) if of == layer))
    }

    /// Begins to gather a layer, unless it is there or on its way.
    ///
    /// It takes the place of the layer that is further from it: passes go from one layer to the next, up or down, and say which
    /// comes next while the one before is in use, so that is the one that is done with. What is replaced follows from the
    /// layers asked for alone, so all members gather the same.
    pub(super) fn begin(&mut self, layer: usize, own: &Arc<AlignedBytes>) -> Result<()> {
        if self.find(layer).is_some() {
            return Ok(());
        }
        let distance = |slot: &Slot| match slot.held {
            Held::Nothing => usize::MAX,
            Held::Coming(of) | Held::Layer(of) => of.abs_diff(layer),
        };
        let place = usize::from(distance(&self.slots[1]) > distance(&self.slots[0]));
        if let Held::Coming(of) = self.slots[place].held {
            self.await_slot(place, of)?;
        }
        let Some(gather) = &mut self.gather else {
            let problem = "this worker belongs to no group that shares it".to_owned();
            return Err(Error::NotGathered { layer, problem });
        };
        let slot = &mut self.slots[place];
        slot.held = Held::Coming(layer);
        gather.begin(layer, Arc::clone(own), std::mem::take(&mut slot.bytes));
        self.gathered += 1;
        Ok(())
    }

    fn await_slot(&mut self, place: usize, layer: usize) -> Result<()> {
        let Some(gather) = &mut self.gather else { return Ok(()) };
        match gather.finish(layer) {
            Ok(bytes) => {
                self.slots[place] = Slot { held: Held::Layer(layer), bytes };
                Ok(())
            }
            Err(problem) => {
                self.detach();
                Err(Error::NotGathered { layer, problem })
            }
        }
    }

    /// The bytes of a layer that was begun.
    pub(super) fn finish(&mut self, layer: usize) -> Result<&[u8]> {
        let place = self.find(layer).unwrap_or(0);
        if matches!(self.slots[place].held, Held::Coming(_)) {
            self.await_slot(place, layer)?;
        }
        Ok(self.slots[place].bytes.bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Notes what is gathered; gives each layer its own number as a byte.
    #[derive(Default, Clone)]
    struct Notes {
        order: Arc<Mutex<Vec<usize>>>,
        places: Arc<Mutex<Vec<(usize, AlignedBytes)>>>,
    }

    impl LayerGather for Notes {
        fn begin(&mut self, layer: usize, _own: Arc<AlignedBytes>, mut place: AlignedBytes) {
            place.bytes_mut().fill(layer as u8);
            self.order.lock().unwrap().push(layer);
            self.places.lock().unwrap().push((layer, place));
        }

        fn finish(&mut self, layer: usize) -> Result<AlignedBytes, String> {
            let mut places = self.places.lock().unwrap();
            let at = places.iter().position(|(of, _)| *of == layer).ok_or("it was not begun")?;
            Ok(places.remove(at).1)
        }
    }

    /// A pass up and down again, as the decoder asks for layers: the two at the turn are gathered once.
    #[test]
    fn a_pass_gathers_each_layer_once_up_and_once_down_but_for_the_two_at_either_end() {
        let own = Arc::new(AlignedBytes::zeros(64));
        let notes = Notes::default();
        let mut slots = Slots::default();
        slots.attach(Box::new(notes.clone()), 64);
        slots.begin(0, &own).unwrap();
        let mut visit = |layer: usize, next: Option<usize>| {
            if let Some(next) = next {
                slots.begin(next, &own).unwrap();
            }
            slots.begin(layer, &own).unwrap();
            assert!(slots.finish(layer).unwrap().iter().all(|byte| *byte == layer as u8));
        };
        let mut expected = vec![0, 1, 2, 3, 4, 2, 1, 0];
        for pass in 0..2 {
            (0..5).for_each(|layer| visit(layer, (layer < 4).then_some(layer + 1)));
            (0..5).rev().for_each(|layer| visit(layer, layer.checked_sub(1)));
            if pass == 1 {
                expected.extend([2, 3, 4, 2, 1, 0]);
            }
            assert_eq!(*notes.order.lock().unwrap(), expected);
        }
    }
}
