// PE dot products of SIMD int8 pairs each per cycle, accumulated in int32. `first` starts new sums
// and `last` ends them; `done` is high in the one cycle in which `sums` holds the ended ones.
// Latency from `last` to `done`: 4 cycles. No stalls: the issuer spaces the ends.
`default_nettype none
module gatelet_array #(
    parameter PE = 16,
    parameter SIMD = 8
) (
    input  wire                 clk,
    input  wire                 resetn,
    input  wire                 valid,
    input  wire                 first,
    input  wire                 last,
    input  wire [SIMD*8-1:0]    values,
    input  wire [PE*SIMD*8-1:0] weights,
    output wire [PE*32-1:0]     sums,
    output reg                  done
);
  reg [SIMD*8-1:0] a;
  reg [PE*SIMD*8-1:0] w;
  reg [2:0] v, f, l;

  always @(posedge clk) begin
    a <= values;
    w <= weights;
    f <= {f[1:0], first};
    if (!resetn) begin
      v <= 3'd0;
      l <= 3'd0;
      done <= 1'b0;
    end else begin
      v <= {v[1:0], valid};
      l <= {l[1:0], valid & last};
      done <= l[2];
    end
  end

  genvar p, s;
  generate
    for (p = 0; p < PE; p = p + 1) begin : g_pe
      reg signed [31:0] acc;
      reg signed [31:0] dot;
      wire [SIMD*16-1:0] products;
      for (s = 0; s < SIMD; s = s + 1) begin : g_mul
        reg signed [15:0] product;
        always @(posedge clk)
          product <= $signed(a[s*8+:8]) * $signed(w[(p*SIMD+s)*8+:8]);
        assign products[s*16+:16] = product;
      end
      reg signed [31:0] total;
      integer i;
      always @* begin
        total = 32'sd0;
        for (i = 0; i < SIMD; i = i + 1) total = total + {{16{products[i*16+15]}}, products[i*16+:16]};
      end
      always @(posedge clk) begin
        dot <= total;
        if (v[2]) acc <= f[2] ? dot : acc + dot;
      end
      assign sums[p*32+:32] = acc;
    end
  endgenerate
endmodule
`default_nettype wire
