//! Ending a collective from another thread.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::error::Error;

/// Ends a collective from any thread: a waiting call returns [`Error::Aborted`] at once, and all later
/// calls fail. Clones end the same collective. Made before joining, so that joining can be ended too.
#[derive(Clone, Default)]
pub struct AbortHandle {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    reason: Option<String>,
    on_abort: Vec<Box<dyn Fn() + Send + Sync>>,
}

impl AbortHandle {
    /// A handle that nothing listens to yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the collective. The first reason stays.
    pub fn abort(&self, reason: impl Into<String>) {
        let mut state = self.lock();
        if state.reason.is_some() {
            return;
        }
        state.reason = Some(reason.into());
        let listeners = std::mem::take(&mut state.on_abort);
        drop(state);
        for listener in listeners {
            listener();
        }
    }

    /// Whether [`AbortHandle::abort`] was called.
    pub fn is_aborted(&self) -> bool {
        self.lock().reason.is_some()
    }

    /// [`Error::Aborted`] if it was called.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match &self.lock().reason {
            Some(reason) => Err(Error::Aborted { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// Has `listener` called by the abort, or at once if there was one.
    pub(crate) fn on_abort(&self, listener: impl Fn() + Send + Sync + 'static) {
        let mut state = self.lock();
        if state.reason.is_some() {
            drop(state);
            listener();
        } else {
            state.on_abort.push(Box::new(listener));
        }
    }

    /// The state stays consistent whatever panicked while it was held: both fields are set in one go.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle").field("reason", &self.lock().reason).finish()
    }
}
