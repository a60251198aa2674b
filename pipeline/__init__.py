"""Lanes, calibration and activation offload: what turns kernels and codecs into something a program calls.

Where to begin reading:

- One tensor: `compress` over `lanes` (`packed`, `video`, `dual`); `basis` and `calibrate` make a basis.
- Offload: `offload` has the hooks, `store` what they store. `policy` says which tensors, `extent` which
  elements; `stash` and `budget` keep the books; `wire` (with `bundle`, `late`) decides which packets stay
  on the GPU, `copies` moves them, `tiers` over `arena` and `disk` holds them; `checker` compares.
- Offload with "auto": `step_auto` follows a step. `recorder`, `marks` and `lesson` learn it, `step_plan`
  searches on `step_model`; `moves`, `derive`, `blocks` and `passage` carry out; `explain` tells.
- A lane for one tensor: `choice` over `prediction`, `planner` and `decision`, from `machine` (measured by
  `probe*`) and `samples`; `tensor_auto` is the lane that learns.
- `chain` over `stages` and `streams`; `dual_wire`; `recompute` for keys and values; `checkpoint`; `wrap`.

Words: autograd keeps a *ticket* for a *stash*, which has the packet's *home*: a *transit* of the wire, a
*parcel* of a plan, a *part* of a bundle, or memory where it is. A *claim* is bytes of a budget, a *slot* a
piece of pinned memory. A *trip* is one forward pass with its backward, a *lesson* what it showed, a *script*
a lesson with a plan.
"""
