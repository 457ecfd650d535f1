//! Memory of the device: what is queued over it, and copies.

use std::sync::Arc;

use shanty_cuda::Span;

use super::{
    super::{
        api::Handle,
        communicator::Work,
        device::{Event, Memory, Staging},
    },
    Call, Core, NcclCollective,
};
use crate::{DeviceCollective, Error, Operation, Result, check};

impl DeviceCollective for NcclCollective {
    fn allocate(&mut self, bytes: usize) -> Result<Span> {
        self.core.card.bind()?;
        Ok(Arc::new(Memory::new(&self.core.card, bytes)?).span())
    }

    fn queue_all_reduce_f32(&mut self, input: &Span, output: &Span) -> Result<()> {
        const SIZE: usize = size_of::<f32>();
        if input.bytes() != output.bytes() || !input.bytes().is_multiple_of(SIZE) {
            let reason = format!("input has {} bytes, output {}, of f32", input.bytes(), output.bytes());
            return Err(Error::Argument { operation: "queue_all_reduce_f32", reason });
        }
        let elements = input.bytes() / SIZE;
        let work = Work::SumF32 { input: input.address(), output: output.address(), elements };
        self.core.on_spans(Call::new(Operation::AllReduceF32, 0, input.bytes()), work, [input, output])
    }

    fn queue_all_gather(&mut self, input: &Span, output: &Span) -> Result<()> {
        let bytes = input.bytes();
        if bytes.checked_mul(self.core.world_size as usize) != Some(output.bytes()) {
            let (room, ranks) = (output.bytes(), self.core.world_size);
            let reason =
                format!("input has {bytes} bytes at each of {ranks} ranks, output has room for {room}");
            return Err(Error::Argument { operation: "queue_all_gather", reason });
        }
        let work = Work::Gather { input: input.address(), output: output.address(), bytes };
        self.core.on_spans(Call::new(Operation::AllGather, 0, bytes), work, [input, output])
    }

    fn queue_broadcast(&mut self, root: u32, buffer: &Span) -> Result<()> {
        check::root(root, self.core.world_size)?;
        let work = Work::Broadcast { buffer: buffer.address(), bytes: buffer.bytes(), root };
        self.core.on_spans(Call::new(Operation::Broadcast, root, buffer.bytes()), work, [buffer, buffer])
    }

    fn upload(&mut self, from: &[u8], to: &Span) -> Result<()> {
        self.copy(to, from.len(), |staging| staging.copy_from_slice(from), true).map(|_| ())
    }

    fn download(&mut self, from: &Span, to: &mut [u8]) -> Result<()> {
        let bytes = self.copy(from, to.len(), |_| {}, false)?;
        to.copy_from_slice(bytes);
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        self.core.check()?;
        let result = self.core.wait_all();
        self.core.note(result)
    }

    fn hold(&mut self, span: &Span) -> Result<()> {
        self.core.check()?;
        let result = self.core.card.bind().and_then(|()| {
            let event = Event::new(&self.core.card)?;
            event.record(self.core.card.stream)?;
            event.hold(span.stream() as Handle)
        });
        self.core.note(result)
    }
}

impl NcclCollective {
    /// Copies between host and a span of the card, in the collective's stream, and waits for it.
    fn copy(
        &mut self,
        span: &Span,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
        is_up: bool,
    ) -> Result<&[u8]> {
        let Self { core, staging } = self;
        core.check()?;
        if bytes != span.bytes() {
            let reason = format!("{bytes} bytes of the host, {} of the device", span.bytes());
            return Err(Error::Argument { operation: "copy", reason });
        }
        let result = (|| {
            core.card.bind()?;
            core.wait_all()?;
            let staging = Staging::reserve(staging, &core.card, bytes)?;
            fill(&mut staging.host.bytes_mut()[..bytes]);
            core.card.follow(span.stream())?;
            if is_up {
                core.card.upload_to(span, &staging.host)?;
            } else {
                core.card.download_from(&mut staging.host, span)?;
            }
            let done = Event::new(&core.card)?;
            done.record(core.card.stream)?;
            let call = Call { sequence: core.sequence, ..Call::new(Operation::Barrier, 0, bytes) };
            core.wait(&call, |_| done.is_over())
        })();
        core.note(result)?;
        Ok(staging.as_ref().map_or(&[], |staging| &staging.host.bytes()[..bytes]))
    }
}

impl Core {
    /// Queues a call over memory of the card, behind the work of its owner.
    fn on_spans(&mut self, call: Call, work: Work, spans: [&Span; 2]) -> Result<()> {
        self.check()?;
        let result = self.card.bind().and_then(|()| {
            let memory = spans.map(|span| Some(span.clone()));
            self.begin(
                call,
                |core| {
                    core.card.follow(spans[0].stream())?;
                    if spans[1].stream() != spans[0].stream() {
                        core.card.follow(spans[1].stream())?;
                    }
                    core.queue(work)
                },
                memory,
            )
        });
        self.note(result)
    }
}
