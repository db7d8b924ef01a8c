# Bitstream of the core behind an AXI DMA. Not run on a board yet; see docs/rtl.md.
#   vivado -mode batch -source build.tcl -tclargs pynq-z2 OUTPUT_FOLDER
#   vivado -mode batch -source build.tcl -tclargs zcu104  OUTPUT_FOLDER
# Writes gatelet.bit and gatelet.hwh. Vivado 2022.1 or later; the ZCU104 needs its board files.
if {[llength $argv] != 2} { error "use: -tclargs pynq-z2|zcu104 OUTPUT_FOLDER" }
lassign $argv board out
set here [file dirname [file normalize [info script]]]
set out [file normalize $out]
switch $board {
  pynq-z2 {
    set part xc7z020clg400-1
    set clock 100
    set sizes {PE 16 SIMD 8 RQ 4 ACT_DEPTH 4096 WEIGHT_DEPTH 2048 PARAM_DEPTH 512 LAYERS 32}
  }
  zcu104 {
    set part xczu7ev-ffvc1156-2-e
    set clock 200
    set sizes {PE 32 SIMD 16 RQ 8 ACT_DEPTH 4096 WEIGHT_DEPTH 1024 PARAM_DEPTH 512 LAYERS 32}
  }
  default { error "board is $board; there are pynq-z2 and zcu104" }
}
array set size $sizes
file mkdir $out
create_project -force -part $part gatelet [file join $out project]
add_files [glob [file join $here .. verilog *.v]]
update_compile_order -fileset sources_1

create_bd_design gatelet
if {$board eq "zcu104"} {
  set_property board_part [lindex [get_board_parts *zcu104*] end] [current_project]
  set ps [create_bd_cell -type ip -vlnv xilinx.com:ip:zynq_ultra_ps_e ps]
  apply_bd_automation -rule xilinx.com:bd_rule:zynq_ultra_ps_e -config {apply_board_preset 1} $ps
  set_property -dict [list CONFIG.PSU__USE__M_AXI_GP0 1 CONFIG.PSU__USE__M_AXI_GP1 0 \
    CONFIG.PSU__USE__M_AXI_GP2 0 CONFIG.PSU__USE__S_AXI_GP2 1 \
    CONFIG.PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ $clock] $ps
  set master ps/M_AXI_HPM0_FPD
  set slave ps/S_AXI_HP0_FPD
} else {
  set ps [create_bd_cell -type ip -vlnv xilinx.com:ip:processing_system7 ps]
  apply_bd_automation -rule xilinx.com:bd_rule:processing_system7 \
    -config {make_external "FIXED_IO, DDR"} $ps
  # Memory and pins are set up by the board's own boot loader; only the ports matter here.
  set_property -dict [list CONFIG.PCW_USE_M_AXI_GP0 1 CONFIG.PCW_USE_S_AXI_HP0 1 \
    CONFIG.PCW_FPGA0_PERIPHERAL_FREQMHZ $clock] $ps
  set master ps/M_AXI_GP0
  set slave ps/S_AXI_HP0
}

set core [create_bd_cell -type module -reference gatelet_core core]
foreach {name value} $sizes { set_property CONFIG.$name $value $core }
set width [expr {$size(SIMD) * 8}]
set dma [create_bd_cell -type ip -vlnv xilinx.com:ip:axi_dma axi_dma_0]
set_property -dict [list CONFIG.c_include_sg 0 CONFIG.c_sg_length_width 23 \
  CONFIG.c_include_mm2s_dre 0 CONFIG.c_include_s2mm_dre 0 \
  CONFIG.c_m_axi_mm2s_data_width $width CONFIG.c_m_axis_mm2s_tdata_width $width \
  CONFIG.c_m_axi_s2mm_data_width $width CONFIG.c_s_axis_s2mm_tdata_width $width \
  CONFIG.c_mm2s_burst_size 16 CONFIG.c_s2mm_burst_size 16] $dma
connect_bd_intf_net [get_bd_intf_pins axi_dma_0/M_AXIS_MM2S] [get_bd_intf_pins core/s_axis]
connect_bd_intf_net [get_bd_intf_pins core/m_axis] [get_bd_intf_pins axi_dma_0/S_AXIS_S2MM]

foreach target {axi_dma_0/S_AXI_LITE core/s_axi} {
  apply_bd_automation -rule xilinx.com:bd_rule:axi4 -config [list Master "/$master" Clk Auto] \
    [get_bd_intf_pins $target]
}
foreach source {axi_dma_0/M_AXI_MM2S axi_dma_0/M_AXI_S2MM} {
  apply_bd_automation -rule xilinx.com:bd_rule:axi4 -config [list Master "/$source" \
    Slave "/$slave" Clk Auto] [get_bd_intf_pins $slave]
}
assign_bd_address
validate_bd_design
save_bd_design

set wrapper [make_wrapper -files [get_files gatelet.bd] -top]
add_files -norecurse $wrapper
set_property top gatelet_wrapper [current_fileset]
launch_runs impl_1 -to_step write_bitstream -jobs 4
wait_on_run impl_1
if {[get_property PROGRESS [get_runs impl_1]] ne "100%"} { error "no bitstream; see the run's log" }
open_run impl_1
if {[get_property SLACK [get_timing_paths]] < 0} { error "timing is not met at $clock MHz" }
set runs [file join $out project gatelet.runs impl_1]
file copy -force [file join $runs gatelet_wrapper.bit] [file join $out gatelet.bit]
set handoff [glob [file join $out project gatelet.gen sources_1 bd gatelet hw_handoff gatelet.hwh]]
file copy -force $handoff [file join $out gatelet.hwh]
