# Resources of the core, by yosys. From accelerators/rtl/verilog, with the parameters of a board:
#   yosys -c ../tcl/resources.tcl                                      (pynq-z2)
#   BOARD=zcu104 yosys -c ../tcl/resources.tcl
yosys -import
set board [expr {[info exists ::env(BOARD)] ? $::env(BOARD) : "pynq-z2"}]
switch $board {
  pynq-z2 { set family xc7;  set sizes {PE 16 SIMD 8 RQ 4 ACT_DEPTH 4096 WEIGHT_DEPTH 2048} }
  zcu104  { set family xcup; set sizes {PE 32 SIMD 16 RQ 8 ACT_DEPTH 4096 WEIGHT_DEPTH 1024} }
  default { error "BOARD is $board; there are pynq-z2 and zcu104" }
}
foreach file {array core pack ram requantise unpack} { read_verilog gatelet_$file.v }
foreach {name value} $sizes { chparam -set $name $value gatelet_core }
# The core is one part of a design: no pads.
synth_xilinx -top gatelet_core -family $family -flatten -noiopad
stat -tech xilinx
