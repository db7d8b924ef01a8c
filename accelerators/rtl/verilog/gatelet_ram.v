// Simple dual-port block RAM: one write port, one read port, one cycle of latency.
`default_nettype none
module gatelet_ram #(
    parameter WIDTH = 64,
    parameter DEPTH = 512,
    parameter AW = 9
) (
    input  wire             clk,
    input  wire             we,
    input  wire [AW-1:0]    waddr,
    input  wire [WIDTH-1:0] wdata,
    input  wire [AW-1:0]    raddr,
    output reg  [WIDTH-1:0] rdata
);
  (* ram_style = "block" *) reg [WIDTH-1:0] mem[0:DEPTH-1];
  always @(posedge clk) begin
    if (we) mem[waddr] <= wdata;
    rdata <= mem[raddr];
  end
endmodule
`default_nettype wire
