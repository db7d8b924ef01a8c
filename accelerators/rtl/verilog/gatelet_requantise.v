// int32 sum -> int8 in exactly the steps of a CPU's float32 unit: the sum is converted to float32
// (round half to even), multiplied by a positive normal float32 (round half to even), rounded to
// an integer (half to even), moved by the zero point and clamped. Latency: 9 cycles.
`default_nettype none
module gatelet_requantise (
    input  wire               clk,
    input  wire signed [31:0] sum,
    input  wire signed [31:0] bias,
    input  wire        [31:0] multiplier,
    input  wire signed [ 7:0] zero,
    input  wire signed [ 7:0] low,
    input  wire signed [ 7:0] high,
    output reg  signed [ 7:0] result
);
  // 1: the bias, with the input's zero point folded in
  reg signed [31:0] s1_sum;
  reg        [31:0] s1_mul;
  // 2: sign and magnitude
  reg               s2_neg;
  reg        [31:0] s2_mag;
  reg        [31:0] s2_mul;
  // 3: normalise
  reg               s3_neg, s3_nil;
  reg        [31:0] s3_norm;
  reg        [ 4:0] s3_lz;
  reg        [31:0] s3_mul;
  // 4: round to 24 bits; value = s4_man * 2 ** s4_exp
  reg               s4_neg, s4_nil;
  reg        [23:0] s4_man;
  reg signed [ 9:0] s4_exp;
  reg        [23:0] s4_mul;
  // 5, 6: product
  reg               s5_neg, s5_nil, s6_neg, s6_nil;
  reg        [47:0] s5_prod, s6_prod;
  reg signed [ 9:0] s5_exp, s6_exp;
  // 7: round the product to 24 bits
  reg               s7_neg, s7_nil;
  reg        [23:0] s7_man;
  reg signed [ 9:0] s7_exp;
  // 8: round to an integer; 511 stands for anything larger
  reg               s8_neg;
  reg        [ 8:0] s8_int;

  function [4:0] leading_zeros(input [31:0] value);
    integer i;
    begin
      leading_zeros = 5'd31;
      for (i = 0; i < 32; i = i + 1) if (value[i]) leading_zeros = 5'd31 - i[4:0];
    end
  endfunction

  wire [ 4:0] lz = leading_zeros(s2_mag);

  wire [23:0] a_top = s3_norm[31:8];
  wire        a_up = s3_norm[7] & (|s3_norm[6:0] | s3_norm[8]);
  wire [24:0] a_rounded = {1'b0, a_top} + {24'd0, a_up};

  wire        p_high = s6_prod[47];
  wire [23:0] p_top = p_high ? s6_prod[47:24] : s6_prod[46:23];
  wire        p_guard = p_high ? s6_prod[23] : s6_prod[22];
  wire        p_sticky = p_high ? |s6_prod[22:0] : |s6_prod[21:0];
  wire [24:0] p_rounded = {1'b0, p_top} + {24'd0, p_guard & (p_sticky | p_top[0])};

  // Magnitudes of interest have -24 <= s7_exp <= -16: [0.5, 256).
  wire        i_large = s7_exp > -10'sd16;
  wire        i_small = s7_exp < -10'sd24;
  wire [ 9:0] i_left = s7_exp + 10'sd24;
  wire [31:0] i_wide = {8'd0, s7_man} << i_left[3:0];
  wire        i_up = i_wide[23] & (|i_wide[22:0] | i_wide[24]);

  wire signed [10:0] signed_int = s8_neg ? -$signed({2'b00, s8_int}) : $signed({2'b00, s8_int});
  wire signed [10:0] moved = signed_int + zero;

  always @(posedge clk) begin
    s1_sum  <= sum + bias;
    s1_mul  <= multiplier;

    s2_neg  <= s1_sum[31];
    s2_mag  <= s1_sum[31] ? -s1_sum : s1_sum;
    s2_mul  <= s1_mul;

    s3_neg  <= s2_neg;
    s3_nil  <= s2_mag == 0;
    s3_norm <= s2_mag << lz;
    s3_lz   <= lz;
    s3_mul  <= s2_mul;

    s4_neg  <= s3_neg;
    s4_nil  <= s3_nil;
    s4_man  <= a_rounded[24] ? 24'h800000 : a_rounded[23:0];
    // 8 from dropping eight bits; 150 is float32's bias and fraction.
    s4_exp  <= $signed({2'b00, s3_mul[30:23]}) - 10'sd142 - $signed({5'd0, s3_lz})
             + $signed({9'd0, a_rounded[24]});
    s4_mul  <= {1'b1, s3_mul[22:0]};

    s5_neg  <= s4_neg;
    s5_nil  <= s4_nil;
    s5_prod <= s4_man * s4_mul;
    s5_exp  <= s4_exp;
    s6_neg  <= s5_neg;
    s6_nil  <= s5_nil;
    s6_prod <= s5_prod;
    s6_exp  <= s5_exp;

    s7_neg  <= s6_neg;
    s7_nil  <= s6_nil;
    s7_man  <= p_rounded[24] ? 24'h800000 : p_rounded[23:0];
    s7_exp  <= s6_exp + (p_high ? 10'sd24 : 10'sd23) + $signed({9'd0, p_rounded[24]});

    s8_neg  <= s7_neg;
    if (s7_nil | i_small) s8_int <= 9'd0;
    else if (i_large) s8_int <= 9'd511;
    else s8_int <= {1'b0, i_wide[31:24]} + {8'd0, i_up};

    if (moved < low) result <= low;
    else if (moved > high) result <= high;
    else result <= moved[7:0];
  end
endmodule
`default_nettype wire
