"""Lanes, calibration and activation offload: what turns kernels and codecs into something a program calls.

Where to begin reading:

- One tensor: `compress` over `lanes` (`packed`, `video`, `dual`); `basis` and `calibrate` make a basis.
- Offload: `offload` has the hooks, over `entries`, `store` what they store. `policy` says which tensors,
  `extent` which elements; `stash` and `budget` keep the books, `report` and `waits` the figures; `wire` (with
  `bundle`, `late`) decides which packets stay on the GPU, `copies` moves them, `tiers` over `arena` and
  `disk` holds them; `checker` compares tensors, `gradients` what a lane does to a step.
- Offload with "auto": `step_auto` follows a step. `recorder`, `marks` and `lesson` learn it, `step_plan`
  searches on `step_model`; `moves` (in place of `wire`), `derive`, `blocks` and `passage` carry out;
  `explain` tells.
- A lane for one tensor: `choice` over `prediction`, `planner` and `decision`, from `machine` (measured by
  `probe*`) and `samples`; `tensor_auto` is the lane that learns.
- `chain` over `stages` and `streams` (`trace` shows it); `dual_wire`; `recompute` for keys and values, with
  `rates`; `checkpoint`; `wrap`.
- Below them: `octets` are the bytes of a tensor; `pool` and `space` lend memory, `blockfile` is a file of it;
  `sampling` and `spread` take times, `throttle` makes wires slow, `linear` solves small programmes.

Words of offload:

- Autograd keeps a *ticket* for a *stash*, a saved tensor as it is stored. Its *home* is where the packet is:
  a *transit* of `wire`, a *parcel* of `moves` (in a *crate* while its size is not known), memory of its
  device or of the host; or `Remade` for one that is *derived*: computed again from other saved ones.
- A *bundle* is many small packets that leave as one; each is a *part*. A *late* packet is one whose size
  the device has still to compute.
- A *claim* is bytes of a budget, a *promise* one on room off the device; a *slot* is pinned memory.
- A *trip* is one training step, forward and backward, a *mark* a moment of it (a tensor saved or used, a
  block entered or left) and a *gap* the time before a mark. A *lesson* is the profile of a step that trips
  have shown, an *entry* one of its tensors; a *script* is a lesson with its plan.
- A *choice* of a plan: "keep" a tensor, keep its code "here", send it "away", or "derive" it by its *recipe*.
- What autograd keeps instead of a ticket: `Kept`, a tensor that was left alone; `Tracked`, either with its
  number in a trip. `Held` is a tensor that a plan keeps.

Chains and dual wires have tickets, parcels and blocks of their own, which nothing of offload uses.

"Note: [Name]" in a docstring heads an explanation that other files refer to by that name.
"""
