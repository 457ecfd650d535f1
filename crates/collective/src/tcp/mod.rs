//! A generation whose members are processes, joined in a ring of TCP connections.

use std::{
    fmt,
    net::{SocketAddr, ToSocketAddrs},
    time::Duration,
};

use crate::{AbortHandle, Collective, HopHook, Result};

/// The secret of a generation. Never sent; not shown by `Debug`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; 32]);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// What a member must know to join a generation.
#[derive(Debug, Clone)]
pub struct JoinOptions {
    /// The job; members must agree.
    pub job: String,
    /// The generation; members must agree.
    pub generation: u64,
    /// This member's number.
    pub rank: u32,
    /// Where each member listens, `host:port`, by rank; this member included.
    pub members: Vec<String>,
    /// The generation's secret.
    pub token: Token,
    /// How long joining may take.
    pub deadline: Duration,
}

/// Where this process accepts its neighbours' connections. Bound once; generations come and go on it.
pub struct Listener {}

impl Listener {
    /// Binds the first of `address` that can be had.
    ///
    /// # Errors
    /// [`Error::Bind`](crate::Error::Bind)
    pub fn bind(address: impl ToSocketAddrs + fmt::Debug) -> Result<Self> {
        let _ = address;
        unimplemented!()
    }

    /// The address that it is bound to, with the port that the system chose.
    pub fn local_addr(&self) -> SocketAddr {
        unimplemented!()
    }

    /// Joins a generation: returns when every member is connected.
    ///
    /// # Errors
    /// [`Error::Join`](crate::Error::Join) after the deadline, [`Error::Aborted`](crate::Error::Aborted),
    /// [`Error::Argument`](crate::Error::Argument) for options that do not fit together.
    pub fn join(&self, options: &JoinOptions, abort: AbortHandle) -> Result<TcpCollective> {
        let _ = (options, abort);
        unimplemented!()
    }
}

/// One member of a generation over TCP.
pub struct TcpCollective {}

impl Collective for TcpCollective {
    fn rank(&self) -> u32 {
        unimplemented!()
    }
    fn world_size(&self) -> u32 {
        unimplemented!()
    }
    fn all_reduce_f32(&mut self, _: &[f32], _: &mut [f32]) -> Result<()> {
        unimplemented!()
    }
    fn all_reduce_u64(&mut self, _: &mut [u64]) -> Result<()> {
        unimplemented!()
    }
    fn all_gather(&mut self, _: &[u8], _: &mut [u8]) -> Result<()> {
        unimplemented!()
    }
    fn broadcast(&mut self, _: u32, _: &mut [u8]) -> Result<()> {
        unimplemented!()
    }
    fn abort_handle(&self) -> AbortHandle {
        unimplemented!()
    }
    fn set_hop_hook(&mut self, _: Option<HopHook>) {
        unimplemented!()
    }
    fn set_call_deadline(&mut self, _: Option<Duration>) {
        unimplemented!()
    }
}
