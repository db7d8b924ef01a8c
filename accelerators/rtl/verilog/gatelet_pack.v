// Rows of whole words -> bytes of a stream without gaps; the inverse of gatelet_unpack. `finish`
// says that no word will follow, so that what is left goes out with TLAST.
`default_nettype none
module gatelet_pack #(
    parameter SIMD = 8
) (
    input  wire              clk,
    input  wire              clear,
    input  wire [SIMD*8-1:0] word,
    input  wire [7:0]        word_bytes,
    input  wire              word_valid,
    output wire              word_ready,
    input  wire              finish,
    output wire              empty,
    output wire [SIMD*8-1:0] m_data,
    output reg  [SIMD-1:0]   m_keep,
    output wire              m_last,
    output wire              m_valid,
    input  wire              m_ready
);
  reg [2*SIMD*8-1:0] store;
  reg [7:0] count;

  assign empty = count == 0;
  assign m_valid = count >= SIMD || (finish && count != 0);
  assign m_last = finish && count <= SIMD;
  assign m_data = store[SIMD*8-1:0];
  assign word_ready = count <= SIMD;

  reg [SIMD*8-1:0] mask;
  integer i;
  always @*
    for (i = 0; i < SIMD; i = i + 1) begin
      m_keep[i] = i < count;
      mask[i*8+:8] = {8{i < word_bytes}};
    end

  wire send = m_valid && m_ready;
  wire [7:0] kept = !send ? count : count > SIMD ? count - SIMD : 8'd0;
  wire [2*SIMD*8-1:0] shifted = send ? {{(SIMD * 8) {1'b0}}, store[2*SIMD*8-1:SIMD*8]} : store;
  wire accept = word_valid && word_ready;

  always @(posedge clk) begin
    if (clear) begin
      store <= 0;
      count <= 0;
    end else begin
      store <= accept ? shifted | ({{(SIMD * 8) {1'b0}}, word & mask} << {kept, 3'd0}) : shifted;
      count <= accept ? kept + word_bytes : kept;
    end
  end
endmodule
`default_nettype wire
